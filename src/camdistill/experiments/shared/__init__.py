"""What all experiments share: worker processes and statistics over seeds."""
