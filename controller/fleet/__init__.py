"""The controller's side of the fleet: observations and effects as plain values, and the agents behind them."""
