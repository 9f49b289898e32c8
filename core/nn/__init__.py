"""Networks and blocks that do not know what their axes mean."""
