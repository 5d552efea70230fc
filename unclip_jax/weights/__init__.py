"""Models on disk and in memory: our folders, public weights, the box model."""
