"""The compiler: capture a model, couple its channels, rewrite it smaller, verify the result."""
