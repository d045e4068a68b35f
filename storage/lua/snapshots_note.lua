-- Note that a node has snapshots, or is getting them and so lacks them.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  node
-- ARGV[2]  'here' or 'arriving'
-- ARGV[3]  milliseconds for which it is believed
-- ARGV[4…] chain IDs
-- Safe to repeat.
-- include: whereabouts
local prefix, node, is_here, ttl_ms, now = KEYS[1], ARGV[1], ARGV[2] == 'here', ARGV[3], now_ms_exact()
for i = 4, #ARGV do
  local noted, other = here_key(prefix, ARGV[i]), arriving_key(prefix, ARGV[i])
  if not is_here then
    noted, other = other, noted
  end
  redis.call('ZADD', noted, now, node)
  redis.call('PEXPIRE', noted, ttl_ms)
  redis.call('ZREM', other, node)
end
