-- Renew a waiter that has not left.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] key
-- ARGV[2] worker
-- ARGV[3] milliseconds from now
-- return  1 if it is on record, else 0
-- include: time
-- include: flight
local waiters = waiters_key(KEYS[1], ARGV[1])
-- XX: a renewal that is overtaken by its own `leave` must not make a waiter out of nobody.
redis.call('ZADD', waiters, 'XX', now_ms() + tonumber(ARGV[3]), ARGV[2])
return redis.call('ZSCORE', waiters, ARGV[2]) and 1 or 0
