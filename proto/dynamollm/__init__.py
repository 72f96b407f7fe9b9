"""Generated gRPC API of DynamoLLM; see scripts/gen-proto."""
