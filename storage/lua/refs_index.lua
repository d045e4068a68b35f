-- Note which refs stand on which, and use which blobs, for records that were written before that was noted.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1…] ref ID, parent ID or '', digest of its blob; and so on
-- Safe to repeat. A record that has gone meanwhile is left out.
-- include: collect
local prefix = KEYS[1]
for i = 1, #ARGV, 3 do
  local id, parent, digest = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('EXISTS', prefix .. ':ref:' .. id) == 1 then
    redis.call('SADD', users_key(prefix, digest), id)
    if parent ~= '' then
      redis.call('SADD', children_key(prefix, parent), id)
    end
  end
end
