-- Note that an op runs on a node, for a time.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] node
-- ARGV[2] the run
-- ARGV[3] milliseconds for which it is believed
-- Safe to repeat: it is believed from now on.
-- include: whereabouts
-- include: time
local ops, now, ttl_ms = ops_key(KEYS[1], ARGV[1]), now_ms(), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', ops, '-inf', now)
redis.call('ZADD', ops, now + ttl_ms, ARGV[2])
if redis.call('PTTL', ops) < ttl_ms then
  redis.call('PEXPIRE', ops, ttl_ms)
end
