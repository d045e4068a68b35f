-- Keep slots. One that lapsed meanwhile is taken again, limit or not: its request is under way all the same.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  milliseconds from now
-- ARGV[2…] host, name of the slot, host, name of the slot, …
-- include: time
local expires = now_ms() + tonumber(ARGV[1])
for i = 2, #ARGV, 2 do
  local slots = KEYS[1] .. ':slots:' .. ARGV[i]
  redis.call('ZADD', slots, expires, ARGV[i + 1])
  redis.call('PEXPIREAT', slots, expires)
end
