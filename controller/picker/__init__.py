"""The other ways in: Envoy's external processor and access log, its endpoint discovery, and the Gateway service.

They listen on one gRPC port of `dynamollm-gateway` and share the brain of its own HTTP server (gateway/brain.py): one
count of what runs where, whichever way it came.
"""
