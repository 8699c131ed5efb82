"""A run on a cluster that is reached by HTTP alone, as a job of Ray: `zoray submit`, `zoray logs`, questions."""
