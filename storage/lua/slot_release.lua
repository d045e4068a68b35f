-- Give a slot, or a place in the queue, back.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] name of the slot
-- ARGV[3] kind of the request
-- ARGV[4] account that made it
-- include: time
-- include: host
-- include: circuit
-- include: quota
local prefix, host, slot = KEYS[1], ARGV[1], ARGV[2]
redis.call('ZREM', prefix .. ':slots:' .. host, slot)
redis.call('ZREM', prefix .. ':queue:' .. host, slot)
redis.call('ZREM', prefix .. ':queue-seen:' .. host, slot)
circuit_left(prefix, host, slot, now_ms())
quota_left(prefix, host, ARGV[3], ARGV[4], slot)
