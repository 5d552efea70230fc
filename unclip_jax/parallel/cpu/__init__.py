"""All that is tuned for CPUs; the library behaves the same without it."""
