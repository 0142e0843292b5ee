"""How fast clbench is here: rates of the machine, seconds of the learners, and what code that does not care would take."""
