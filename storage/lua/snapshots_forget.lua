-- Let nothing count any more that was noted of a node's snapshots so far.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] node
-- include: whereabouts
redis.call('ZADD', noted_key(KEYS[1]), now_ms_exact(), ARGV[1])
