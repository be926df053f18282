"""`hdp report RUN`: one HTML file that shows a run, without torch and without a network.

files.py   what a run folder holds, read with tolerance: a run may still be going or be damaged
trace.py   trace_STEP.json: the plan of one step and what became of it
curves.py  rows of metrics as curves of at most a thousand points, however long the run
plans.py   a trace as boxes to draw and to point at
page.py    all of it as one page; page.css and page.js go into it as they are
"""
