"""The image of a cluster's nodes."""
