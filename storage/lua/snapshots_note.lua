-- Note that a node has snapshots, or is getting them and so lacks them, or has them no more.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  node
-- ARGV[2]  'here', 'arriving' or 'gone'
-- ARGV[3]  milliseconds for which it is believed
-- ARGV[4…] chain IDs
-- Safe to repeat.
-- include: whereabouts
local prefix, node, what, ttl_ms, now = KEYS[1], ARGV[1], ARGV[2], ARGV[3], now_ms_exact()
for i = 4, #ARGV do
  local keys = {here = here_key(prefix, ARGV[i]), arriving = arriving_key(prefix, ARGV[i])}
  for name, key in pairs(keys) do
    if name == what then
      redis.call('ZADD', key, now, node)
      redis.call('PEXPIRE', key, ttl_ms)
    else
      redis.call('ZREM', key, node)
    end
  end
end
