"""Records of a run about itself: router statistics, throughput, and the places of the rows."""
