"""Selection: from scores and options to the units that go."""
