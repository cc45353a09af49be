"""Where and when remelt runs: executors on Ray, studies, and the command line."""
