"""Measurements: a server through HTTP (`bench serve`) and one step of the engine from within (`bench latency`).

config.py      what is measured
workloads.py   the requests, made before the clock starts; pictures.py their pictures
events.py      a stream of server-sent events, timed as it arrived, becomes a reply or a failure
target.py      one server: its model, one request
clients.py     many clients at once: a fixed number of requests, or streams beside arriving pictures
processes.py   the process tree of a server: its memory, and holding it still while another one is measured
serve.py       targets in turn, round after round
figures.py     percentiles and rates of what came back
report.py      the table and the JSON; plot.py the picture
machine.py     where it was measured

latency.py     one engine in this process: prompts, decode steps, pictures
instruments.py puts spans around its parts; spans.py adds up who spends the time
latency_report.py tables and JSON of that
"""
