-- Record a result under cache keys.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  record ID, which names the result
-- ARGV[2]  the result, payload
-- ARGV[3]  most records of one key: the least recently published go
-- ARGV[4]  seconds for which keys and records are kept without being used
-- ARGV[5…] keys
-- return   when it was published, microseconds
-- Safe to repeat.
-- include: stamp
local prefix, id, stamp, kept_s = KEYS[1], ARGV[1], now_us(), ARGV[4]
local record = prefix .. ':record:' .. id
redis.call('HSET', record, 'result', ARGV[2], 'published', stamp)
redis.call('EXPIRE', record, kept_s)
for i = 5, #ARGV do
  local key = prefix .. ':key:' .. ARGV[i]
  redis.call('ZADD', key, stamp, id)
  redis.call('ZREMRANGEBYRANK', key, 0, -1 - tonumber(ARGV[3]))
  redis.call('EXPIRE', key, kept_s)
end
return stamp
