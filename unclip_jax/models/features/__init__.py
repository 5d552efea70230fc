"""Feature networks that figures are measured with."""
