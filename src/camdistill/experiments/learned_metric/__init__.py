"""Learns a metric of maps from rankings."""
