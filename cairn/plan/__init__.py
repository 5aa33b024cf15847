"""`cairn plan`: memory, speed, time and cost of a run before it starts."""
