"""The demo, `python -m bilevel.demo`: find wrong labels among digits, by several solvers and by plain training."""
