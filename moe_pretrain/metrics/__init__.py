"""What a run writes down about itself: router statistics, throughput, and where the rows go."""
