"""Two hosts on this machine: network namespaces with a link of a known rate, round trip and loss between them.

`wire` is the link, `hosts` the namespaces and what runs in them, `raw_tcp` the limit, `client` what measures,
`python -m benchmarks.links` the program.
"""
