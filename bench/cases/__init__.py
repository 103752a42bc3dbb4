"""What is measured, as data: operations and suites."""
