-- Say which nodes the cluster has, and forget that one drains which has long been none of them.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  payload of the nodes
-- ARGV[2]  milliseconds for which a node that is told of no more is still taken to drain
-- ARGV[3…] the nodes' names
-- Safe to repeat: the second tells the same.
-- include: time
local prefix, now, named = KEYS[1], now_ms(), {}
local draining = prefix .. ':draining'
redis.call('SET', prefix .. ':nodes', ARGV[1])
for i = 3, #ARGV do
  named[ARGV[i]] = true
end
for _, node in ipairs(redis.call('ZRANGE', draining, 0, -1)) do
  if named[node] then
    redis.call('ZADD', draining, now, node)
  end
end
redis.call('ZREMRANGEBYSCORE', draining, '-inf', '(' .. (now - tonumber(ARGV[2])))
