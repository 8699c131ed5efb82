"""Ray: the coordinator, the replicas, and the fleet that makes them."""
