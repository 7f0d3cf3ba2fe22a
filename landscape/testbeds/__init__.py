"""The embedded default: digits, small trained networks, losses with a known answer."""
