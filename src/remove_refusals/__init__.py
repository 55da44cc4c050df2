"""Find the direction in the residual stream that mediates refusal, take it out, and measure what that did."""
