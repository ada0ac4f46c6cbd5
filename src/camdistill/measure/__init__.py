"""Measures of maps: how good a map is, and how close it is to another one."""
