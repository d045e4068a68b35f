-- Have a node drain: nothing new is given to it until it is told to take work again.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] node
-- Safe to repeat: it drains already.
-- include: time
redis.call('ZADD', KEYS[1] .. ':draining', now_ms(), ARGV[1])
