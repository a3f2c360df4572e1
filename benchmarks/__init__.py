"""Programs that measure, and the result files they wrote."""
