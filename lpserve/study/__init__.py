"""Many runs that differ in single choices, and which choices matter."""
