"""Sweeps: many runs over ranges of their settings, as members of populations, in one study that many slices share.

ranges     what is searched, as text            slice      members come, train, report, end
plan       groups, programs, how long           crowd      their iterations are one program
study      who runs what, and what became of it sequence   the stages that train one run at a time
heartbeat  who is alive                         results    rows, CSV, Parquet
"""
