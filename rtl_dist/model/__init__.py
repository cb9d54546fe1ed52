"""The network: built, cut into parts, frozen, averaged, kept as a folder."""
