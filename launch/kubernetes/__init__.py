"""A run on Kubernetes: `zoray render`, the objects it makes of a configuration, and what KubeRay refuses."""
