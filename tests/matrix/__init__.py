"""``make matrix``: chosen tests in environments with other versions, and the table in docs/versions.md.

combinations.toml   which versions together, and which tests
environments.py     one environment a combination, made by uv
runs.py             the tests of one combination in its environment, and what came of them
selection.py        the plugin of pytest that leaves only the chosen tests
probe.py            what is installed there, and which passes the plan skips
table.py            what came of all as a page
"""
