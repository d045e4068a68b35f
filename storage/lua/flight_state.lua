-- Read a flight, for people.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] key
-- return  {fence, owner, milliseconds left, aborting, current bytes, total bytes, waiters, parts uploaded}, or nil
-- include: time
-- include: flight
return flight_told(KEYS[1], ARGV[1], now_ms()) or false
