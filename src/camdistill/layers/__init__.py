"""What a layer does: statistics of one sweep, receptive fields, filters, patches, units."""
