"""An explainer's parameters adapted to what its maps teach."""
