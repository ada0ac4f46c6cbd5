"""The engine: one forward, its graph, and maps by closed form or one backward."""
