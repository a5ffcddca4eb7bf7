"""How good is a retriever, and how sure can we be? Requests, metrics, intervals, baselines, reports."""
