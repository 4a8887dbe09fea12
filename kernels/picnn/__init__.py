"""Room picnn: value and input gradient of a partially input-convex network in one scalar input."""
