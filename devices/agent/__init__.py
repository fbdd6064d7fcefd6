"""The program that runs on a board: Python 3.8 or newer, nothing but the standard library. Start at `server.py`.

It is a package here and one file there: `transport/connection.py` makes a zip of it that Python runs. What comes in are
requests, what goes out are answers, in frames over stdin and stdout: header length and payload length (32 bits each, big
endian), a JSON object, raw bytes. Every request has one answer. A loaded model is in a process of its own, which holds the
runtime, or beside another one in the same process, where the two are timed together: what kills it (SIGILL, SIGSEGV, the kernel
when memory runs out) becomes an answer.

    hello  {folder}                                    -> what the board is: see `board.describe_board`
    has    {sha256}                                    -> {has}
    put    {sha256, size, offset} + bytes              -> {done}; a file is there when its digest is right
    drop   {sha256}                                    -> {}; the file is gone
    runtime {runtime}                                  -> {package, version} of what can be imported there
    load   {sha256, runtime, threads, affinity, beside: handle or null}
                                                       -> {handle, package, version, inputs: [{name, kind, shape}]}
    run    {handle, tensors: [{name, dtype, shape}]} + bytes, little endian -> {tensors} + bytes; the inputs stay in place
    warm   {handles, floor_ns, seconds, window}        -> {k: inferences in a sample, of each, seconds}
    pairs  {handles, k, rounds, seconds, seed}         -> {wall_ns, cpu_ns: one list for each, peak_rss_bytes, ...}
    memory {handle}                                    -> {peak_rss_bytes}
    layers {handle, runs}                              -> {layers: [[name, kind, ns]]} by the runtime's own profiler
    unload {handle}                                    -> {}; its process ends with the last of its models
    ping {}, quit {}
    anything that cannot be done -> {"ok": false, "kind", "error": "one line"}, kind one of "request", "runtime", "load",
    "run", "memory", "disk", "died" (the model's process), "deadline" (it took longer than the request's deadline_s)

It ends itself, and its models' processes with it, when its stdin closes, when no request has come for --idle seconds,
and when a request has taken longer than its deadline. One agent at a time works in a folder: a second one says "busy".
"""
