"""The emoji data sets: art, catalogue, captions and builders."""
