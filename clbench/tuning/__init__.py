"""Options chosen on one stream, frozen, evaluated once on another: `clbench tune`."""
