"""The request path: classify, queue, pick an instance, forward, report. Its own process: `dynamollm-gateway`."""
