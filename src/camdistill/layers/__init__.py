"""What layers do: a sweep's statistics, filters, findings, and single units."""
