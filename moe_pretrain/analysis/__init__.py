"""Questions asked about runs: plan, verify, certify, compare, report."""
